"""reftune: Reinforced Fine-Tuning (ReFT, Luong et al., ACL 2024, arXiv:2401.08967)."""

__version__ = "0.1.0"
