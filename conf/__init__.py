"""What a run is: the typed schema, the YAML groups that fill it and the rules that guard it.

Imports no torch; `conf.load` alone imports Hydra.
"""
