"""the operator's pages: traces, pauses, drains, hours of jobs, the audit log

Revision: 0003; follows 0002.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "queue_pauses",
        sa.Column("queue", sa.String(length=40), nullable=False),
        sa.Column("paused_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("queue", name=op.f("pk_queue_pauses")),
    )
    op.create_table(
        "hours_of_jobs",
        sa.Column("start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended", sa.JSON(), nullable=False),
        sa.Column("output_px", sa.BigInteger(), nullable=False),
        sa.Column("waits", sa.JSON(), nullable=False),
        sa.Column("runs", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("start", name=op.f("pk_hours_of_jobs")),
    )
    op.create_table(
        "audit_entries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("key_name", sa.String(length=100), nullable=False),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_entries")),
    )
    op.add_column("attempts", sa.Column("trace", sa.JSON(), nullable=True))
    op.add_column("workers", sa.Column("drained_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("workers", sa.Column("usage", sa.JSON(), nullable=True))
    op.create_index("ix_jobs_state_id", "jobs", ["state", "id"], unique=False)


def downgrade() -> None:

    op.drop_index("ix_jobs_state_id", table_name="jobs")
    op.drop_column("workers", "usage")
    op.drop_column("workers", "drained_at")
    op.drop_column("attempts", "trace")
    op.drop_table("audit_entries")
    op.drop_table("hours_of_jobs")
    op.drop_table("queue_pauses")
