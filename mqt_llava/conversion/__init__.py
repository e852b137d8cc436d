"""
Other people's checkpoints to this project's layout: released and self-trained MQT-LLaVA, LLaVA-1.5, LoRA adapters.

`released` says what the authors' files mean, `files` reads and writes tensors one at a time, `convert` joins the two,
`load` is the same without writing anything, `components` builds a new model from a tower and a language model.
"""
