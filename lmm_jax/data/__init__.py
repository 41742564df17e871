"""Files to arrays: pictures, videos, prompts, token layouts."""
