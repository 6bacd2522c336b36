package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

type versionOptions struct{ *session }

func newVersion(s *session) *cobra.Command {
	o := &versionOptions{s}
	c := &cobra.Command{
		Use: "version", GroupID: groupPair,
		Short: "Show the version of this program",
		Args:  args(),
		RunE:  func(*cobra.Command, []string) error { return o.run() },
	}
	s.jsonFlag(c)
	return c
}

// version is what a build says of itself.
type version struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a changed work tree
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func buildVersion() version {
	v := version{
		Version: "unknown", Go: runtime.Version(),
		Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	v.Version = info.Main.Version
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Revision = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

func (o *versionOptions) run() error {
	v := buildVersion()
	if o.json {
		return o.printJSON(v)
	}
	from := ""
	if v.Revision != "" {
		from = " revision " + v.Revision
		if v.Modified {
			from += " (changed)"
		}
	}
	_, err := fmt.Fprintf(o.out, "pollux %s%s, %s, %s\n", v.Version, from, v.Go, v.Platform)
	return err
}
