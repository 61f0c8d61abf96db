"""reports, previews and models of one's own

Revision: 0006; follows 0005.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "own_models",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("card", sa.JSON(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_own_models")),
    )
    op.add_column("jobs", sa.Column("preview", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("report", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("report")
        batch_op.drop_column("preview")
    op.drop_table("own_models")
