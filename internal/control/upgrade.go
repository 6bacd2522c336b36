package control

import (
	"context"
	"net/http"
	"time"
)

// ProtocolVersion is that of what commands, agent and guests say to each other over
// control sockets, and of the arguments with which an agent is started by another. It
// is raised by what the other side would misread; new requests and fields are no such.
const ProtocolVersion = 1

// Program names a build of the program.
type Program struct {
	// Build is the beginning of the SHA-256 of its file, in hexadecimal.
	Build   string `json:"build"`
	Version string `json:"version,omitempty"` // as it says itself
}

// String returns version and build.
func (p Program) String() string {
	if p.Version == "" {
		return p.Build
	}
	return p.Version + " (" + p.Build + ")"
}

// UpgradeRequest asks for another program for agent and guests, one after the other.
// One of Binary, Rollback and Resume says which.
type UpgradeRequest struct {
	Binary   string `json:"binary,omitempty"`   // path of the new program
	Rollback bool   `json:"rollback,omitempty"` // the program that was in use before
	Resume   bool   `json:"resume,omitempty"`   // go on with one that stopped
	// AcceptAlerts goes on although alerts stand now; new ones stop the upgrade.
	AcceptAlerts bool `json:"accept_alerts,omitempty"`
	// Watch is how long a guest is watched after it serves with its new program.
	Watch Duration `json:"watch_ms,omitempty"`
}

// UpgradeCheck says whether an upgrade would be begun now.
type UpgradeCheck struct {
	OK     bool        `json:"ok"`
	From   Program     `json:"from"`
	To     Program     `json:"to"`
	Checks []CheckItem `json:"checks"`
	// Held says what nobody may ask for while both programs are in use.
	Held []string `json:"held,omitempty"`
	// Lost says what is done without, and made anew.
	Lost []string `json:"lost,omitempty"`
	// Plan is what would be done, in order.
	Plan []string `json:"plan,omitempty"`
}

// The states of an upgrade.
const (
	UpgradeRunning     = "running"
	UpgradeStopped     = "stopped"     // at a doubt: Why says at which; it can go on or back
	UpgradeInterrupted = "interrupted" // its agent ended; it can go on or back
	UpgradeFailed      = "failed"      // at a doubt, and nothing of it is left
	UpgradeDone        = "done"
)

// Upgrade is one that runs, or the last one.
type Upgrade struct {
	State   string    `json:"state"`
	Back    bool      `json:"back,omitempty"` // to the program before
	From    Program   `json:"from"`
	To      Program   `json:"to"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	Why     string    `json:"why,omitempty"` // it is not done
	// Doing is the step that is under way.
	Doing string        `json:"doing,omitempty"`
	Steps []UpgradeStep `json:"steps"`
	Held  []string      `json:"held,omitempty"` // see UpgradeCheck
	// Guests says which build each guest is started with.
	Guests map[string]string `json:"guests"`
}

// Pending tells whether the upgrade is neither done nor undone.
func (u *Upgrade) Pending() bool {
	return u != nil && u.State != UpgradeDone && u.State != UpgradeFailed
}

// UpgradeStep is a step that was done, or that failed.
type UpgradeStep struct {
	Guest string    `json:"guest,omitempty"`
	What  string    `json:"what"`
	At    time.Time `json:"at"` // when it began
	Took  Duration  `json:"took_ms"`
	Error string    `json:"error,omitempty"`
}

// Programs are those that a pair keeps, and the upgrade that runs or ran last.
type Programs struct {
	Current  Program  `json:"current"`
	Previous *Program `json:"previous,omitempty"`
	Upgrade  *Upgrade `json:"upgrade,omitempty"`
}

// CheckUpgrade says whether an upgrade would be begun now. Nothing is changed.
func (c *Client) CheckUpgrade(ctx context.Context, req UpgradeRequest) (r UpgradeCheck, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/upgrade/check", req, &r)
	return r, err
}

// StartUpgrade begins an upgrade, which goes on without the caller.
func (c *Client) StartUpgrade(ctx context.Context, req UpgradeRequest) (p Programs, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/upgrade", req, &p)
	return p, err
}

// Programs tells of the programs of the pair and of an upgrade.
func (c *Client) Programs(ctx context.Context) (p Programs, err error) {
	err = c.agent.call(ctx, http.MethodGet, "/v1/upgrade", nil, &p)
	return p, err
}
