"""Artifacts on disk: built under a lock and renamed when whole, verified, listed, and bundled for storages.

Names, ids and manifests are ``prefopt.artifacts``, which this builds on. Imports no other group of modules.
"""
