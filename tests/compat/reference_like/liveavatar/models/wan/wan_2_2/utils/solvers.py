raise AssertionError("a script that makes video must not need this")
