package cli

import "github.com/spf13/cobra"

func newDedup(s *session) *cobra.Command {
	return group("dedup", groupStorage, "What deduplication saves", "What deduplication saves.",
		newDedupEstimate(s))
}
