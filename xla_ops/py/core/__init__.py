"""Machinery shared by all ops: declare, check, encode, call, update in place."""
