package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/region"
)

func sortedKeys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// checkTakeover says what would hinder this guest from taking over identity
// now. The agent adds what it knows itself.
func (g *Guest) checkTakeover(ctx context.Context, id string) (control.TakeoverCheck, error) {
	r := control.TakeoverCheck{Of: id, By: g.opt.Name, OK: true}
	add := func(name string, ok bool, why string) {
		r.OK = r.OK && ok
		r.Checks = append(r.Checks, control.CheckItem{Name: name, OK: ok, Why: why})
	}
	set := g.settings(id)
	if set == nil || id == g.opt.Name {
		return r, control.NewError(control.KindInvalid, fmt.Sprintf("guest %s cannot take over %q", g.opt.Name, id), "")
	}
	holds, mapped, agent := false, false, false
	var bytes, index int64
	err := g.ask(ctx, func() {
		holds = g.m.Phase(id) != ""
		agent = g.m.View().Agent
		if w := g.watches[id]; w != nil {
			mapped, bytes = true, w.Header().Size
			for _, s := range w.Sections(region.SectionIndex) {
				index += s.Length
			}
		}
	})
	if err != nil {
		return r, err
	}
	if holds {
		add("identity", false, fmt.Sprintf("%s holds %s already", g.opt.Name, id))
		return r, nil
	}
	add("line to the agent", agent, pick(agent, "it is up", "only the agent can fence, and it is not on the line"))
	none := len(set.Pool.Devices) == 0
	add("region", mapped || none, pick(none, "it has no pool", pick(mapped, fmt.Sprintf("mapped read-only, %s", config.Size(bytes)), "it is not mapped: the guest may not have announced it")))
	for _, paths := range set.Pool.Groups() {
		name := "device "
		if len(paths) > 1 {
			name = "mirror of "
		}
		said, err := g.reach(paths, id)
		if errors.Is(err, ErrNoPool) && slices.Contains(set.Pool.Removing, paths[0]) {
			said, err = "it was removed from the pool", nil
		}
		add(name+strings.Join(paths, ", "), err == nil, pick(err == nil, said, fmt.Sprint(err)))
	}
	if none {
		add("devices", true, "it has no pool")
	}
	need := headroom(g.cfg, set, index)
	free, from := available()
	add("memory", free >= need, fmt.Sprintf("%s needed for the second pool, %s available (%s)", roundMiB(need), roundMiB(free), from))
	return r, nil
}

func pick(ok bool, yes, no string) string {
	if ok {
		return yes
	}
	return no
}

// reach reads the label of a device, or of a mirror of which some copies may be
// missing, and says what it found.
func (g *Guest) reach(paths []string, id string) (string, error) {
	without := ""
	d, err := openToLook(paths, func(path string, why error) { without += fmt.Sprintf("; without %s: %v", path, why) })
	if err != nil {
		return "", fmt.Errorf("%w%s", err, without)
	}
	l, err := g.opt.Storage.Label(d)
	err = errors.Join(err, d.Close())
	if err == nil && l.Identity != "" && l.Identity != id {
		err = fmt.Errorf("it belongs to pool %s of %s", l.Name, l.Identity)
	}
	return "pool " + l.Name + ", readable from here" + without, err
}

// headroom is what a second pool takes of memory beside its region, which is
// there already: its counts, what its index of fingerprints needs beyond the bytes that
// the region has for it, what its flash takes, and its buffers with the index of its log.
func headroom(cfg *config.Config, set *config.Guest, index int64) int64 {
	p, _ := plan(cfg, []poolNeeds{needsOf(cfg, set)}) // whether it fits into the settings is not asked here
	return p.Counts + max(0, p.Index-index) + p.Flash + p.Work - workBase
}

func roundMiB(n int64) config.Size { return config.Size(n &^ (1<<20 - 1)) }

// available is what this process can still take, and what says so.
func available() (int64, string) {
	free, from := memAvailable(), "of the host"
	if limit, ok := readNumber("/sys/fs/cgroup/memory.max"); ok {
		if used, ok := readNumber("/sys/fs/cgroup/memory.current"); ok && limit-used < free {
			free, from = limit-used, "of the control group"
		}
	}
	return free, from
}

func readNumber(path string) (int64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil
}

func memAvailable() int64 {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if w := strings.Fields(sc.Text()); len(w) >= 2 && w[0] == "MemAvailable:" {
			n, _ := strconv.ParseInt(w[1], 10, 64)
			return n << 10
		}
	}
	return 0
}
