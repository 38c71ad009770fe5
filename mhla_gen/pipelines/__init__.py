"""Our own pipelines, which training saves and sampling runs."""
