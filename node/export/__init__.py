"""A trained model as a Hugging Face folder: `plain` says whether it is a plain Llama and makes its weights, `tokenizer`
writes its tokenizer, `folder` writes it all. JSON and safetensors only: nothing here needs `transformers` itself.
"""
