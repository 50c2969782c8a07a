"""Conversion between Hugging Face folders and our arrays, tensor by tensor.

    tensorfiles.py   safetensors files: lazy reading, streamed writing
    fp8.py           dequantization of DeepSeek's block-wise fp8
    mxfp4.py         dequantization of microscaling fp4
    families/        one file per released layout: names of its tensors, fields of its config.json, defaults
    config_json.py   config.json <-> Config, in both directions from the tables in families/; parts of it are in
                     rope_scaling.py, windows.py and json_fields.py
    layouts.py       the layout that can represent a model, and what a layout cannot hold
    weights.py       from the tables and the shapes: a folder as our stacked arrays, our arrays as a folder
    checkpoint_folder.py  opening, checking and writing of a folder as a model

The arrays of a folder are lazy: they have a shape and a dtype and are read when indexed. A checkpoint larger than
memory can be loaded directly into the shards of a mesh, or converted layer by layer to a checkpoint of ours.
"""
