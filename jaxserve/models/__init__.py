"""Model definitions: a Hugging Face config goes in, a functional decoder over explicit parameters comes out."""
