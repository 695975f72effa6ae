"""Cartridges: KV prefixes, trained or prefilled, named so that they can be kept, routed and injected."""
