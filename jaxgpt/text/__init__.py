"""Sources of text: named corpora, documents, and token folders."""
