"""The torch modules behind the tensor tables, and their exact rewrites."""
