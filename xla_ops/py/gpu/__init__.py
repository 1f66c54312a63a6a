"""What gives torch_xla 2.9.0 an NVIDIA GPU: JAX's CUDA plugin behind a bridge.

    discover        which plugin
    driver          what the NVIDIA driver tells about this machine
    visible         how many GPUs are visible, asked without CUDA
    cuda_libraries  what of CUDA XLA opens, where it looks, which wheels bring it
    options         what the environment asks of the client
    flags           XLA's own, of several processes
    check           whether plugin, driver, GPUs and kernels go together
    plugin          all of it, for torch_xla's entry point (the module xla_ops_pjrt)

Nothing of this is imported before a GPU client is asked for.
"""
