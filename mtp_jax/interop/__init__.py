"""Hugging Face folders in and out, tensor by tensor.

    tensorfiles.py   safetensors files: lazy reading, streamed writing
    fp8.py           DeepSeek's block-wise fp8, dequantised
    hf_config/       config.json <-> Config, both ways from the tables of hf_fields.py
    families.py      one table of names per family, the same for both directions
    weights.py       tables and shapes together: a folder as our stacked arrays, our arrays as a folder

A folder's arrays are lazy: they have a shape and a dtype and are read where they are indexed, so a checkpoint larger
than the memory goes straight into the shards of a mesh, or layer by layer into a checkpoint of ours.
"""
