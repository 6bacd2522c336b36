package cli

import "github.com/spf13/cobra"

// newGuestProcess is what the agent starts a guest with; it is nothing that a
// person calls.
func newGuestProcess(s *session) *cobra.Command {
	return &cobra.Command{
		Use:                "guest-process",
		Short:              "Run one guest (called by the agent)",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE:               func(c *cobra.Command, args []string) error { return s.backend.guest(c.Context(), args) },
	}
}
