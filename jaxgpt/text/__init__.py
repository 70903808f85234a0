"""Where text comes from: named corpora, documents, and folders of tokens."""
