from invarlock.assurance.certification import certify as certify

__all__ = ["__version__", "certify"]
__version__: str
