"""The documented facade: `GPA` (settings and tracker), `UPA` (what is done to networks), `PBM`
(ready-made modules and processors)."""
