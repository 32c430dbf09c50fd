"""Programs that measure and fuzz ragkv for those who change it. They need a clone: the wheel leaves them out."""
