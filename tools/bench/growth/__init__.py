"""Benches of growing, converting and switching training states."""
