"""The KV cache of one worker as memory: its layout, its keys, copies to and from chunks."""
