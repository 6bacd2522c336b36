package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/release"
)

type versionOptions struct {
	*session
	formats bool
}

func newVersion(s *session) *cobra.Command {
	o := &versionOptions{session: s}
	c := &cobra.Command{
		Use: "version", GroupID: groupPair,
		Short: "Show the version of this program",
		Long: `Show the version of this program.

With --formats it also shows which versions of each format it reads and writes, on
devices, in regions and in what processes say to each other. Two programs work as a
pair, as they do during an upgrade, when each reads what the other writes.`,
		Args: args(),
		RunE: func(*cobra.Command, []string) error { return o.run() },
	}
	c.Flags().BoolVar(&o.formats, "formats", false, "show the versions of formats that it reads and writes")
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

	Formats []release.Format `json:"formats,omitempty"`
}

func buildVersion() version {
	v := version{
		Version: release.Version(), Go: runtime.Version(),
		Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
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
	if o.formats {
		v.Formats = release.Formats()
	}
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
	if err != nil || !o.formats {
		return err
	}
	rows := [][]string{{"FORMAT", "WHERE", "READS", "WRITES", "WHEN ASKED", "CAN DO WITHOUT"}}
	for _, f := range v.Formats {
		writes := "-"
		if f.Writes != 0 {
			writes = strconv.Itoa(f.Writes)
		}
		without := "-"
		if f.Advisory {
			without = "yes"
		}
		rows = append(rows, []string{f.Name, string(f.Place), fmt.Sprintf("%d to %d", f.ReadsFrom, f.ReadsTo), writes, strconv.Itoa(f.Asked), without})
	}
	return table(o.out, rows)
}
