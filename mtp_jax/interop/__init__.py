"""Hugging Face folders in and out, tensor by tensor.

    tensorfiles.py   safetensors files: lazy reading, streamed writing
    fp8.py           DeepSeek's block-wise fp8, dequantised
    mxfp4.py         microscaling fp4, dequantised
    families/        one file per released layout: names of its tensors, fields of its config.json, defaults
    config_json.py   config.json <-> Config, both ways from those tables; rope_scaling.py, json_fields.py: parts of it
    weights.py       tables and shapes together: a folder as our stacked arrays, our arrays as a folder
    checkpoint_folder.py  a folder opened and checked as a model, and written

A folder's arrays are lazy: they have a shape and a dtype and are read where they are indexed, so a checkpoint larger
than the memory goes straight into the shards of a mesh, or layer by layer into a checkpoint of ours.
"""
