package cluster

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Options say what Up makes. Directory has to be set.
type Options struct {
	// Directory gets the cluster's state, about 500 MB for each node. It must not exist, or be empty.
	Directory string
	// Nodes is how many there are; 0: one. They are called node1, node2, …
	Nodes  int
	Family Families
	// DisableAdmission names admission plugins that are on by default and are to be off: PodSecurity, for example.
	DisableAdmission []string
	// APIServerFlags are given to kube-apiserver after the others: of two with one name, the last counts.
	APIServerFlags []string
	// Images are archives, as docker save or an OCI layout in a tar file, that every node gets before it is ready.
	Images []string
	Life   Lifetime
	// Log hears of builds of binaries. Nil: nobody does.
	Log *slog.Logger
}

// Families are the IP families that nodes, pods and services have.
type Families string

// The families of a cluster.
const (
	IPv4      Families = ""
	DualStack Families = "dual-stack" // IPv4 first, and IPv6
)

// Lifetime says when a cluster ends other than by Down.
type Lifetime int

// The lifetimes.
const (
	UntilDown   Lifetime = iota
	WithProcess          // when the process that called Up ends, however it ends; left are its directory, and cgroups until the next Up
)

// mostNodes is as many as the nodes' network has addresses for, with room to spare.
const mostNodes = 200

// check says what is missing on this machine, all of it at once.
func (o Options) check() error {
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, "root: nodes are namespaces with mounts and cgroups of their own\n  hint: sudo, or a machine of your own")
	}
	if o.Nodes < 0 || o.Nodes > mostNodes {
		missing = append(missing, fmt.Sprintf("nodes: %d, where 1 to %d can be", o.Nodes, mostNodes))
	}
	directory, err := filepath.Abs(o.Directory)
	if err != nil {
		return err
	}
	for _, hidden := range []string{"/etc", "/opt", "/run", "/var/lib", "/var/log"} {
		if strings.HasPrefix(directory+"/", hidden+"/") {
			missing = append(missing, fmt.Sprintf("another directory than %s: nodes have their own %s\n  hint: use one elsewhere", directory, hidden))
		}
	}
	if entries, err := os.ReadDir(directory); err == nil && len(entries) > 0 {
		missing = append(missing, fmt.Sprintf("an empty directory: %s has something in it\n  hint: a cluster that runs there is removed with `cluster down`", directory))
	}
	for _, program := range []struct{ name, hint string }{
		{"nft", "apt-get install nftables: kube-proxy writes its rules with it"},
		{"nsenter", "apt-get install util-linux"},
	} {
		if _, err := exec.LookPath(program.name); err != nil && !exists("/usr/sbin/"+program.name) {
			missing = append(missing, fmt.Sprintf("the program %s\n  hint: %s", program.name, program.hint))
		}
	}
	if text, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(text), "\toverlay\n") {
		missing = append(missing, "overlayfs in the kernel\n  hint: modprobe overlay")
	}
	for _, f := range []struct{ path, what string }{
		{"/proc/sys/net/bridge/bridge-nf-call-iptables", "bridged packets in netfilter\n  hint: modprobe br_netfilter"},
		{"/proc/sys/net/netfilter/nf_conntrack_max", "connection tracking in the kernel\n  hint: modprobe nf_conntrack"},
		{"/sys/fs/cgroup", "cgroups\n  hint: mount them on /sys/fs/cgroup"},
	} {
		if _, err := os.Stat(f.path); err != nil {
			missing = append(missing, f.what)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("a cluster cannot run here; it needs:\n- %s", strings.Join(missing, "\n- "))
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// state is what is known of a running cluster by those who did not start it: state.json in its directory.
type state struct {
	Network *network   `json:"network"`
	Control *Machine   `json:"control"`
	Nodes   []*Machine `json:"nodes"`
}

const stateFile = "state.json"

func (s state) write(directory string) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(directory, stateFile)
	if err := os.WriteFile(file+".new", append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func readState(directory string) (s state, err error) {
	text, err := os.ReadFile(filepath.Join(directory, stateFile))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("%s: %w", filepath.Join(directory, stateFile), err)
	}
	return s, nil
}
