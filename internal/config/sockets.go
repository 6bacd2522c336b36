package config

import (
	"fmt"
	"net/url"
	"path/filepath"
)

// VhostUser are the settings of the sockets at which virtual machines attach to volumes.
type VhostUser struct {
	// Off makes no such sockets.
	Off bool `yaml:"off" json:"off,omitempty"`
	// Dir is where they are, in a directory for each identity. Default DIR/vhost.
	Dir string `yaml:"dir" json:"dir"`
	// Queues is how many a machine may use at a volume. Default 16.
	Queues int `yaml:"queues" json:"queues"`
}

// MaxVhostQueues is the most queues of a machine at a volume. A server could take more: it
// serves single devices as well, and a pair has thousands of volumes.
const MaxVhostQueues = 64

func (v *VhostUser) setDefaults(dir string) {
	if or(&v.Dir, "vhost"); !filepath.IsAbs(v.Dir) {
		v.Dir = filepath.Join(dir, v.Dir)
	}
	or(&v.Queues, 16)
}

func (v *VhostUser) validate() error {
	if v.Queues < 1 || v.Queues > MaxVhostQueues {
		return fmt.Errorf("vhost_user.queues: %d; 1 to %d are possible", v.Queues, MaxVhostQueues)
	}
	return nil
}

// Rings are the settings of the sockets at which programs open volumes over rings in
// shared memory.
type Rings struct {
	// Off makes no such sockets.
	Off bool `yaml:"off" json:"off,omitempty"`
	// Dir is where they are, in a directory for each identity. Default DIR/ring.
	Dir string `yaml:"dir" json:"dir"`
	// Clients is how many rings a volume may have at once. Default 64.
	Clients int `yaml:"clients" json:"clients"`
}

// MaxRings is the most rings of a volume.
const MaxRings = 1024

func (r *Rings) setDefaults(dir string) {
	if or(&r.Dir, "ring"); !filepath.IsAbs(r.Dir) {
		r.Dir = filepath.Join(dir, r.Dir)
	}
	or(&r.Clients, 64)
}

func (r *Rings) validate() error {
	if r.Clients < 1 || r.Clients > MaxRings {
		return fmt.Errorf("rings.clients: %d; 1 to %d are possible", r.Clients, MaxRings)
	}
	return nil
}

// VhostDir is where the sockets of an identity's volumes for virtual machines are.
func (c *Config) VhostDir(identity string) string { return filepath.Join(c.VhostUser.Dir, identity) }

// RingDir is where the sockets of an identity's volumes for rings are.
func (c *Config) RingDir(identity string) string { return filepath.Join(c.Rings.Dir, identity) }

// VhostSocket is the socket at which virtual machines attach to a volume. It is an error
// if the path is longer than the system allows for one.
func (c *Config) VhostSocket(identity, volume string) (string, error) {
	return volumeSocket(c.VhostDir(identity), "vhost_user.dir", volume, ".sock")
}

// RingSocket is the socket at which programs open a volume over a ring. It is an error
// if the path is longer than the system allows for one.
func (c *Config) RingSocket(identity, volume string) (string, error) {
	return volumeSocket(c.RingDir(identity), "rings.dir", volume, ".ring")
}

// volumeSocket returns the socket of a volume in a directory, which a setting says.
func volumeSocket(dir, setting, volume, ending string) (string, error) {
	// A name that a pool from elsewhere has brought may have anything in it.
	path := filepath.Join(dir, url.PathEscape(volume)+ending)
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("the path of its socket, %s, has %d bytes, and the system allows %d: set %s to a shorter directory, or rename the volume", path, len(path), maxSocketPath, setting)
	}
	return path, nil
}
