"""How many tokens a prompt has: by the model's tokenizer, its backend, or an estimate."""
