//go:build planted

package sim

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/planted"
)

var (
	plantedSeeds = flag.Int("planted-seeds", 1000, "random runs to give each planted fault")
	plantedOnly  = flag.String("planted-only", "", "look at this planted fault alone")
	plantedChild = flag.String("planted-child", "", "used by TestPlanted itself")
)

// elsewhere names the tests that find what random runs meet too seldom.
var elsewhere = map[planted.Fault]string{
	planted.ExchangeInUse:        "TestExchange of internal/devices",
	planted.RecordUnproved:       "TestRecordOfAnotherDevice of internal/pool",
	planted.KeptJournalEarly:     "TestPlantedHere of internal/pool",
	planted.KeptJournalUnproved:  "TestPlantedHere of internal/pool",
	planted.FlashRedirectEarly:   "TestPlantedHere of internal/flashmap",
	planted.FlashSlotReusedEarly: "TestPlantedHere of internal/flashmap",
	planted.FlashReturnUnseen:    "TestPlantedHere of internal/flashmap",
	planted.FlashNoteInPlace:     "TestPlantedHere of internal/flashmap, and the text flash-leaves",
	planted.FlashNoteUnsure:      "TestPlantedHere of internal/flashmap",
	planted.FlashTableUnsure:     "TestPlantedHere of internal/flashmap",
	planted.RingSubmitEarly:      "TestPlantedHere of internal/ring",
	planted.RingCompleteEarly:    "TestPlantedHere of internal/ring",
	planted.RingTakenEarly:       "TestPlantedHere of internal/ring",
	planted.RingUnordered:        "TestPlantedHere of internal/ring",
	planted.RingRunsCompleted:    "TestPlantedHere of internal/ring",
	planted.InflightBatchIgnored: "TestPlantedHere of internal/export/vhostuser",
	planted.InflightTailKept:     "TestPlantedHere of internal/export/vhostuser",
	planted.InflightCounterReset: "TestPlantedHere of internal/export/vhostuser",
	planted.InflightClearedEarly: "TestPlantedHere of internal/export/vhostuser",
	planted.InflightRunAgain:     "TestPlantedHere of internal/export/vhostuser",
	planted.RingTagUnasked:       "TestPlantedHere of internal/export/ring",
}

// TestPlanted gives the program each planted fault in turn and looks how many
// runs it takes until something is found. What is not found fails the test.
// The runs are made by a process of their own, for a fault may take it with it.
func TestPlanted(t *testing.T) {
	if *plantedChild != "" {
		plantedRuns(t)
		return
	}
	var table strings.Builder
	missed := 0
	for _, f := range planted.All() {
		if *plantedOnly != "" && f.Name != *plantedOnly {
			continue
		}
		if by := elsewhere[planted.Fault(f.Name)]; by != "" && *plantedOnly == "" {
			t.Logf("%s is left to %s", f.Name, by)
			continue
		}
		began := time.Now()
		found, by := hunt(t, f.Name)
		if found == 0 {
			missed++
			by = "NOT FOUND"
		}
		line := fmt.Sprintf("| %s | %s | %s | %d | %s |", f.Name, f.What, f.Where, found, by)
		fmt.Fprintln(&table, line)
		fmt.Printf("%6.1fs %s\n", time.Since(began).Seconds(), line)
	}
	t.Logf("\n| fault | what it is | where | runs | found as |\n|---|---|---|--:|---|\n%s", table.String())
	if missed > 0 {
		t.Fatalf("%d planted faults were not found", missed)
	}
}

// hunt returns how many runs it took to find the fault, and as what.
func hunt(t *testing.T, name string) (runs int, by string) {
	out := filepath.Join(t.TempDir(), "runs")
	cmd := exec.Command(os.Args[0], "-test.run=^TestPlanted$", "-planted-child="+out, fmt.Sprint("-planted-seeds=", *plantedSeeds), "-test.timeout=0")
	cmd.Env = append(os.Environ(), "POLLUX_PLANTED="+name)
	text, err := cmd.CombinedOutput()
	lines := strings.Split(strings.TrimSpace(readAll(out)), "\n")
	last := lines[len(lines)-1]
	if _, verdict, ok := strings.Cut(last, ": "); ok {
		return len(lines), verdict
	}
	if err == nil {
		return 0, ""
	}
	for _, l := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(l, "panic: ") || strings.HasPrefix(l, "fatal error: ") {
			return len(lines), l
		}
	}
	return len(lines), "the process failed: " + err.Error()
}

func readAll(path string) string {
	p, _ := os.ReadFile(path) // nothing, when the child did not come so far
	return string(p)
}

// plantedRuns plays random runs until one fails, and writes a line for each: its
// name, and what was found.
func plantedRuns(t *testing.T) {
	f, err := os.Create(*plantedChild)
	if err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(*plantedSeeds) {
		fmt.Fprintf(f, "seed %d", seed+1)
		if r := Run(t, Draw(seed+1), 0); r.Err != nil {
			fmt.Fprintf(f, ": %s\n", strings.ReplaceAll(fmt.Sprintf("%.160s", r.Err), "|", "/"))
			return
		}
		fmt.Fprintln(f)
	}
}
