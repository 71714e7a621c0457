"""Data of WallVLA: reading and writing LeRobot datasets, co-training mixtures, statistics, collation.

Nothing is imported here, so that `wallvla.data` costs nothing; name the module that you need:
`from wallvla.data.lerobot import LeRobotDataset`.
"""
