"""What can be shown of the kernels without running them on a GPU: resources, work, models of their time."""
