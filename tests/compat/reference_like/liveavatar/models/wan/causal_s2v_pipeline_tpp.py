raise AssertionError("the backend's module was expected in place of this one")
