package cli

import (
	"bytes"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/internal/control"
)

// printStatus shows the pair to somebody who was woken by it: first whether
// it is protected and what is wrong, then who does what, then the figures.
func (s *session) printStatus(st control.Status) error {
	var b bytes.Buffer
	b.WriteString(verdict(st))
	for _, a := range st.AllAlerts() {
		fmt.Fprintf(&b, "  ! %s\n", a)
	}
	parts := [][][]string{guestRows(st), volumeRows(st), poolRows(st)}
	for _, rows := range parts {
		if len(rows) > 1 {
			b.WriteByte('\n')
			if err := table(&b, rows); err != nil {
				return err
			}
		}
	}
	if example := qemuExample(st); example != "" {
		fmt.Fprintf(&b, "\nQEMU %s\n", example)
	}
	if line := programs(st); line != "" {
		fmt.Fprintf(&b, "\n%s\n", line)
	}
	if t := st.LastTakeover; t != nil {
		fmt.Fprintf(&b, "\n%s\n", s.lastTakeover(*t))
	}
	if len(st.Notes) > 0 {
		b.WriteByte('\n')
	}
	for _, n := range st.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	_, err := s.out.Write(b.Bytes())
	return err
}

// verdict is the first line.
func verdict(st control.Status) string {
	if st.Protected {
		return "PROTECTED: either guest may die now, and nothing that was acknowledged is lost\n"
	}
	var why []string
	for _, g := range st.Guests {
		if !g.Protected && g.Why != "" && !slices.Contains(why, g.Why) {
			why = append(why, g.Why)
		}
	}
	if len(why) == 0 {
		return "NOT PROTECTED\n"
	}
	return "NOT PROTECTED: " + strings.Join(why, "; ") + "\n"
}

func guestRows(st control.Status) [][]string {
	rows := [][]string{{"GUEST", "STATE", "PID", "SERVES", "PROTECTED", "ADDRESS", "MEMORY", "UPTIME", "RESTARTS"}}
	for _, g := range st.Guests {
		pid := "-"
		if g.PID > 0 {
			pid = strconv.Itoa(g.PID)
		}
		state := g.State
		if g.GivebackIn > 0 {
			state += ", giveback in " + uptime(g.GivebackIn)
		} else if g.LockedOut {
			state += ", giveback by hand"
		}
		rows = append(rows, []string{
			g.Name, state, pid, list(g.Serves), okNo(g.Protected), orDash(g.Address),
			memory(g.Memory), uptime(g.Uptime), strconv.Itoa(g.Restarts),
		})
	}
	return rows
}

// programs says which programs agent and guests run, "" if that is not known.
func programs(st control.Status) string {
	agent := control.Program{Build: st.Agent.Build, Version: st.Agent.Version}
	parts, same := []string{"agent " + agent.String()}, true
	for _, g := range st.Guests {
		p := control.Program{Build: g.Build, Version: g.Version}
		if g.Build == "" {
			p.Build = "unknown"
		}
		same = same && p == agent
		parts = append(parts, "guest "+g.Name+" "+p.String())
	}
	switch {
	case agent.Build == "":
		return ""
	case same:
		return "PROGRAM " + agent.String()
	}
	return "PROGRAMS " + strings.Join(parts, ", ")
}

func memory(m control.MemoryStatus) string {
	if m.Resident == 0 {
		return "-"
	}
	return humanSize(m.Resident)
}

func volumeRows(st control.Status) [][]string {
	rows := [][]string{{"VOLUME", "SIZE", "GUEST", "SERVED BY", "CLIENTS", "URI"}}
	for _, g := range st.Guests {
		for _, e := range g.Exports {
			by := e.ServedBy
			if by == "" {
				by = "NOBODY"
			}
			size := humanSize(e.Size)
			if e.ReadOnly {
				size += " read-only"
			}
			rows = append(rows,
				[]string{e.Volume, size, e.Guest, by, strconv.Itoa(e.Connections), e.NBD},
				[]string{"", "", "", "", "", e.NBDUnix})
			if e.VhostUser != nil {
				rows = append(rows, socketRow(&e.VhostUser.VolumeSocket, "virtual machines"))
			}
			if e.Ring != nil {
				rows = append(rows, socketRow(e.Ring, "rings"))
			}
		}
	}
	return rows
}

// socketRow shows a socket of a volume, which is for such clients.
func socketRow(v *control.VolumeSocket, who string) []string {
	if v.Socket == "" {
		return []string{"", "", "", "", "-", "no socket for " + who + ": " + v.Note}
	}
	return []string{"", "", "", "", strconv.Itoa(v.Clients), v.URI}
}

// qemuExample shows how QEMU attaches to a volume; of each of them `pollux volume show`
// does.
func qemuExample(st control.Status) string {
	for _, g := range st.Guests {
		for _, e := range g.Exports {
			if e.VhostUser != nil && len(e.VhostUser.QEMU) > 0 {
				var words []string
				for _, w := range e.VhostUser.QEMU {
					words = append(words, shellQuote(w))
				}
				return strings.Join(words, " ")
			}
		}
	}
	return ""
}

func poolRows(st control.Status) [][]string {
	rows := [][]string{{"POOL", "GUEST", "CAPACITY", "FREE", "LOG USED", "NOT YET ON DISK", "DEVICES"}}
	for _, g := range st.Guests {
		for _, p := range g.PoolStats {
			var devices []string
			for _, d := range g.Devices {
				if d.Pool == p.Name {
					kind := d.Driver
					if d.Class != "" {
						kind += ", " + classWord(d.Class)
					}
					devices = append(devices, d.Path+" ("+kind+")")
				}
			}
			rows = append(rows, []string{
				p.Name, p.Identity, humanSize(p.Capacity), humanSize(p.Free),
				humanSize(p.LogUsed) + " of " + humanSize(p.LogBytes), humanSize(p.Dirty), list(devices),
			})
		}
	}
	return rows
}

// lastTakeover tells what happened last and how long its parts took.
func (s *session) lastTakeover(t control.Takeover) string {
	how := "automatic"
	if t.Planned {
		how = "planned"
	}
	text := fmt.Sprintf("LAST %s: %s (%s), guest %s took over identity %s, %s",
		strings.ToUpper(orDash(t.Kind)), when(t.Started),
		humanize.RelTime(t.Started, s.now(), "ago", "from now"), t.By, t.Of, how)
	switch t.Kind {
	case control.KindGiveback:
		text = strings.Replace(text, "took over identity", "got back identity", 1)
	case control.KindResumed:
		text = strings.Replace(text, "took over identity", "was started again and serves", 1)
	}
	if t.Reason != "" {
		text += ": " + t.Reason
	}
	if t.Error != "" {
		text += "\n  FAILED: " + t.Error
	}
	return text + "\n  " + steps(t)
}

// printAttach shows commands that attach to the first volume as they are.
func (s *session) printAttach(st control.Status) error {
	var e *control.Export
	for i := range st.Guests {
		if len(st.Guests[i].Exports) > 0 {
			e = &st.Guests[i].Exports[0]
			break
		}
	}
	if e == nil {
		_, err := fmt.Fprintf(s.out, "\nThere is no volume yet; make one:\n  pollux volume create disk1 --size 10G%s\n", dirFlag(s.dir))
		return err
	}
	unix := shellQuote(e.NBDUnix)
	var qemu string
	if u, err := url.Parse(e.NBDUnix); err == nil {
		socket := strings.ReplaceAll(u.Query().Get("socket"), ",", ",,") // QEMU's way to write a comma
		qemu = shellQuote("driver=nbd,server.type=unix,server.path=" + socket +
			",export=" + e.Volume + ",reconnect-delay=60")
	}
	_, err := fmt.Fprintf(s.out, `
Attach to %s, for example:
  nbdinfo %s
  qemu-img info %s
  qemu-img convert -n --target-image-opts IMAGE %s
  nbdcopy IMAGE %s
  fio --name=try --ioengine=nbd --uri=%s --rw=randrw --bs=4k --iodepth=16 --runtime=10 --time_based
`, e.Volume, e.NBD, e.NBD, qemu, unix, unix)
	return err
}
