"""The instruction table: each entry is a mnemonic with its executable meaning."""
