"""Whole files on disk: atomic writes, locks and verified downloads."""
