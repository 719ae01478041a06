"""Grammars: a text's form becomes masks over the vocabulary. Compiled by xgrammar, in a process that can be killed."""
