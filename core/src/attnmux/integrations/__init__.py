"""attnmux inside the libraries that people use: `attnmux.integrations.diffusers`, `attnmux.integrations.transformers`."""
