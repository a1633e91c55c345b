// What every op checks on the host, before it enqueues anything. `op` is the name that its errors begin with.
#pragma once

#include <cstdint>
#include <string>

namespace liveavatar {

// Throws std::invalid_argument if the pointer is null or not aligned.
void check_pointer(const char* op, const char* name, const void* pointer, std::uintptr_t alignment);

// Streaming multiprocessors of the current device.
// Throws std::runtime_error if that is no sm_90, or cannot be told.
int multiprocessors_of_hopper(const char* op);

// The error that a launch left, to be appended to another; often empty, because CUTLASS clears it.
std::string what_cuda_says();

}  // namespace liveavatar
