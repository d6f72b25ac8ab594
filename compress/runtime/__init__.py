"""Running compressed models: modules for weight expressions, and transformers' loader."""
