"""What locks one program in and runs it: a process of its own, which imports the standard library only.

launcher -> guard (new namespaces) -> init (process 1 of them: builds the root folder, watches) -> the program.
`mtp_jax/evaluation/sandbox.py` starts it. Nothing here imports mtp_jax, which would take longer than most programs.
"""
