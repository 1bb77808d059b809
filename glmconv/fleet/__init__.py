"""More than one conversion or one machine: pipelines, copies to many nodes, a look at an installation, what a model needs to be served."""
