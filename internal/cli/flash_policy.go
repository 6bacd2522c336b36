package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

func newFlashPolicy(s *session) *cobra.Command {
	return group("policy", "", "Show and change what moves to flash",
		`The policy of a pool's flash are parameters by name: how use is counted (collect.*), how
often moves are decided (interval), what a data set must show to move to flash
(patterns.CLASS.*, for each class of devices), what keeps sets from going to and fro
(hysteresis.*), and how much is moved (budget.*). Changes count at once, are kept with the
pool, and each is an event. docs/flash.md describes all of them.`,
		newFlashPolicyShow(s), newFlashPolicySet(s), newFlashPolicyReset(s), newFlashPolicyClass(s))
}

type flashPolicyOptions struct {
	*session
	class  string
	file   string
	change control.FlashPolicyChange
}

func newFlashPolicyShow(s *session) *cobra.Command {
	o := &flashPolicyOptions{session: s}
	c := &cobra.Command{
		Use:   "show POOL [--device-class CLASS]",
		Short: "Show the parameters, and which differ from the defaults",
		Long: `Show the parameters of the policy as a file that "pollux flash policy set --file"
takes. Behind those that differ from the defaults a comment has the default.`,
		Args: args("POOL"),
		RunE: func(c *cobra.Command, args []string) error { return o.show(c.Context(), args[0]) },
	}
	classFlag(c, &o.class)
	s.jsonFlag(c)
	return c
}

func newFlashPolicySet(s *session) *cobra.Command {
	o := &flashPolicyOptions{session: s}
	c := &cobra.Command{
		Use:   "set POOL [--device-class CLASS] [NAME=VALUE...] [--file FILE]",
		Short: "Change parameters",
		Long: `Change parameters, all that are named or none. Those of a pattern, such as
min_accesses, need no "patterns.CLASS." before them: they are those of --device-class, or
of the pattern "default", which counts for all classes that have none. A class gets a pattern
of its own, equal to the default one but for what is named, when one of its parameters is
set.

--file has parameters as YAML or JSON; "-" is standard input. What it leaves out stays.
Values are numbers, sizes such as 64M, times such as 10m, and rules: expressions in CEL over
reads, writes, sequential, random, size, age, references, pinned and on_flash.`,
		Example: `  pollux flash policy set pool-a min_accesses=8 budget.migrate=64M
  pollux flash policy set pool-a --device-class sata 'promote=reads > 20.0 && references > 1'
  pollux flash policy show pool-a > policy && pollux flash policy set pool-b --file policy`,
		Args: func(c *cobra.Command, got []string) error {
			if len(got) == 0 {
				return args("POOL", "NAME=VALUE")(c, got)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 1 && o.file == "" {
				return usagef("set what? NAME=VALUE, or --file FILE")
			}
			set, err := o.assigned(args[1:])
			if err != nil {
				return err
			}
			o.change = control.FlashPolicyChange{Class: o.class, Set: set}
			return o.run(c.Context(), args[0])
		},
	}
	classFlag(c, &o.class)
	c.Flags().StringVar(&o.file, "file", "", "file with parameters")
	s.jsonFlag(c)
	return c
}

func newFlashPolicyReset(s *session) *cobra.Command {
	o := &flashPolicyOptions{session: s}
	c := &cobra.Command{
		Use:   "reset POOL [--device-class CLASS] [NAME...]",
		Short: "Give parameters their defaults",
		Long: `Give parameters their defaults: those that are named, groups such as "budget" and
"patterns.sata" too; without a name all of them. With --device-class and without a name the
class loses its pattern, and the default one counts for it.`,
		Example: `  pollux flash policy reset pool-a budget.migrate
  pollux flash policy reset pool-a --device-class sata`,
		Args: func(c *cobra.Command, got []string) error {
			if len(got) == 0 {
				return args("POOL")(c, got)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.change = control.FlashPolicyChange{Class: o.class, Reset: args[1:], ResetAll: len(args) == 1}
			return o.run(c.Context(), args[0])
		},
	}
	classFlag(c, &o.class)
	s.jsonFlag(c)
	return c
}

func newFlashPolicyClass(s *session) *cobra.Command {
	o := &flashPolicyOptions{session: s}
	c := &cobra.Command{
		Use:   "class POOL DEVICE CLASS|default",
		Short: "Give a device a class",
		Long: `Give a device of a pool a class, which selects the pattern by which its data moves to
flash. With "default" it has the class again that follows from the device. Of a mirror, name
any copy.`,
		Args: args("POOL", "DEVICE", "CLASS"),
		RunE: func(c *cobra.Command, args []string) error {
			class := args[2]
			if class == defaultWord {
				class = ""
			} else if err := checkName("class", class); err != nil {
				return err
			}
			o.change = control.FlashPolicyChange{Classes: map[string]string{args[1]: class}}
			return o.run(c.Context(), args[0])
		},
	}
	s.jsonFlag(c)
	return c
}

// assigned returns what the command line and the file set. What the command line says counts.
func (o *flashPolicyOptions) assigned(words []string) (map[string]string, error) {
	set := map[string]string{}
	if err := assignments(words, set); err != nil {
		return nil, err
	}
	if o.file == "" {
		return set, nil
	}
	all, err := o.readPolicy(o.file)
	if err != nil {
		return nil, err
	}
	for name := range set {
		full, err := policy.FullName(name, o.class)
		if err != nil {
			return nil, usagef("%w", err)
		}
		all = slices.DeleteFunc(all, func(a policy.Assignment) bool {
			other, err := policy.FullName(a.Name, o.class)
			return err == nil && other == full
		})
	}
	for _, a := range all {
		set[a.Name] = a.Value
	}
	return set, nil
}

// maxPolicy bounds the size of a file of parameters.
const maxPolicy = 256 << 10

// readPolicy reads a file of parameters; "-" is standard input.
func (s *session) readPolicy(path string) ([]policy.Assignment, error) {
	in := s.in
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, usagef("%w", err)
		}
		defer func() { _ = f.Close() }() // it was only read
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxPolicy+1))
	if err != nil {
		return nil, fmt.Errorf("read the parameters of %s: %w", path, err)
	}
	if len(b) > maxPolicy {
		return nil, usagef("%s has more than %s, which are no parameters", path, humanSize(maxPolicy))
	}
	all, err := policy.Assignments(b)
	if err != nil {
		return nil, usagef("parameters of %s: %w", path, err)
	}
	if len(all) == 0 {
		return nil, usagef("%s has no parameters", path)
	}
	return all, nil
}

func (o *flashPolicyOptions) run(ctx context.Context, name string) error {
	if err := checkName("pool", name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	if len(o.change.Classes) > 0 {
		if o.change.Classes, err = o.classPaths(ctx, client, name); err != nil {
			return err
		}
	}
	p, err := client.ChangeFlashPolicy(ctx, name, o.change)
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(p)
	}
	if len(o.change.Classes) > 0 {
		return o.printTables(classRows(p))
	}
	if len(p.Changes) == 0 {
		fmt.Fprintln(o.err, "nothing has changed: these are the values that count already")
		return nil
	}
	return table(o.out, changeRows(p.Changes))
}

// classPaths makes the path of a device a whole one, unless it is a name by which the pool
// knows a device.
func (o *flashPolicyOptions) classPaths(ctx context.Context, client *control.Client, pool string) (map[string]string, error) {
	p, err := client.FlashPolicy(ctx, pool)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for d, class := range o.change.Classes {
		if !slices.ContainsFunc(p.Classes, func(c control.FlashClass) bool { return c.Device == d }) {
			paths, err := absolute([]string{d})
			if err != nil {
				return nil, err
			}
			d = paths[0]
		}
		out[d] = class
	}
	return out, nil
}

func (o *flashPolicyOptions) show(ctx context.Context, name string) error {
	if err := checkName("pool", name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.FlashPolicy(ctx, name)
	if err != nil {
		return err
	}
	if o.class != "" {
		prefix := "patterns." + o.class + "."
		p.Parameters = slices.DeleteFunc(p.Parameters, func(q control.FlashParameter) bool { return !strings.HasPrefix(q.Name, prefix) })
		p.Classes = slices.DeleteFunc(p.Classes, func(c control.FlashClass) bool { return c.Class != o.class })
		if len(p.Parameters) == 0 {
			return control.NewError(control.KindNotFound, fmt.Sprintf("the class of devices %q has no pattern of its own: the default one counts", o.class),
				fmt.Sprintf("see `pollux flash policy show %s`", name))
		}
	}
	if o.json {
		return o.printJSON(p)
	}
	_, err = io.WriteString(o.out, policyText(p))
	return err
}

func classRows(p control.FlashPolicy) [][]string {
	rows := [][]string{{"DEVICE", "CLASS", "PATTERN"}}
	for _, c := range p.Classes {
		rows = append(rows, []string{c.Device, classText(c), patternOf(p, c.Class)})
	}
	return rows
}

func classText(c control.FlashClass) string {
	if c.Given {
		return c.Class + " (given)"
	}
	return c.Class
}

// patternOf tells whose pattern counts for a class.
func patternOf(p control.FlashPolicy, class string) string {
	if slices.ContainsFunc(p.Parameters, func(q control.FlashParameter) bool { return strings.HasPrefix(q.Name, "patterns."+class+".") }) {
		return class
	}
	return policy.AnyType
}

// policyText is the text of a policy, as policy set takes it.
func policyText(p control.FlashPolicy) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# The flash policy of pool %s. What differs from the defaults has them behind it.\n", p.Pool)
	var open []string // groups that the lines before are in
	for _, q := range p.Parameters {
		path := splitParameter(q.Name)
		groups := path[:len(path)-1]
		same := 0
		for same < min(len(open), len(groups)) && open[same] == groups[same] {
			same++
		}
		for i, g := range groups[same:] {
			fmt.Fprintf(&b, "%s%s:\n", strings.Repeat("  ", same+i), yamlWord(g))
		}
		open = groups
		fmt.Fprintf(&b, "%s%s: %s", strings.Repeat("  ", len(groups)), path[len(path)-1], yamlValue(q.Value))
		if q.Value != q.Default {
			fmt.Fprintf(&b, "  # default: %s", yamlValue(q.Default))
		}
		b.WriteByte('\n')
	}
	for _, c := range p.Classes {
		fmt.Fprintf(&b, "# device %s: class %s, pattern %s\n", c.Device, classText(c), patternOf(p, c.Class))
	}
	return b.String()
}

// splitParameter returns groups and name of a parameter. The class of a pattern may have dots.
func splitParameter(name string) []string {
	if rest, ok := strings.CutPrefix(name, "patterns."); ok {
		if i := strings.LastIndexByte(rest, '.'); i >= 0 {
			return []string{"patterns", rest[:i], rest[i+1:]}
		}
	}
	return strings.Split(name, ".")
}

// yamlPlain are words that are texts in YAML as they are, and yamlTaken those of them that
// are not.
var (
	yamlPlain = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]*$`)
	yamlTaken = map[string]bool{"true": true, "false": true, "null": true, "yes": true, "no": true, "on": true, "off": true, "y": true, "n": true}
	// yamlNumber are numbers, sizes and times, and lists of them.
	yamlNumber = regexp.MustCompile(`^[0-9][A-Za-z0-9.,+-]*$`)
)

func yamlWord(text string) string {
	if yamlPlain.MatchString(text) && !yamlTaken[strings.ToLower(text)] {
		return text
	}
	return strconv.Quote(text)
}

func yamlValue(text string) string {
	switch {
	case yamlNumber.MatchString(text):
		return text
	case strings.ContainsAny(text, "\n\t\r'"):
		return strconv.Quote(text)
	case text == "" || !yamlPlain.MatchString(text) || yamlTaken[text]:
		return "'" + text + "'"
	}
	return text
}
