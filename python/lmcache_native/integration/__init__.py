"""Engines that lmcache-native plugs into, one package each."""
