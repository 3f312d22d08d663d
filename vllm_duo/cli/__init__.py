"""The command ``vllm-duo``: one module per command, imported when it is called."""
