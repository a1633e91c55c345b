raise ImportError("a pipeline lives here: compare must not run it")
