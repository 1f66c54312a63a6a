"""`python -m xla_ops doctor`: what is installed, what works, how to mend the rest.

    diagnose   the command: which checks, in which order
    checks     what is there: versions, libraries, plugin, driver, CUDA's libraries
    probe      what works: programs on each device, in a process of their own (child)
    report     the lines, as text and JSON, and the verdict

What is missing for a GPU is a failure only where PJRT_DEVICE asks for the GPU.
"""
