package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// setting is a kernel setting below /proc/sys/net, of the network namespace of the thread that writes it.
type setting struct {
	path, value string
	optional    bool // newer kernels only, or not of every namespace: missing is no error
}

// everywhere holds what node, pods and outside have in common.
var everywhere = []setting{
	// A path back by another interface is normal here: redirects, sources that a proxy keeps, services.
	{path: "ipv4/conf/all/rp_filter", value: "0"},
	{path: "ipv4/conf/default/rp_filter", value: "0"},
	{path: "ipv4/conf/all/send_redirects", value: "0"},
	{path: "ipv4/conf/default/send_redirects", value: "0"},
	{path: "ipv4/conf/all/accept_redirects", value: "0"},
	{path: "ipv4/conf/default/accept_redirects", value: "0"},
	// An address is usable at once, and none comes by itself.
	{path: "ipv6/conf/all/disable_ipv6", value: "0"},
	{path: "ipv6/conf/default/disable_ipv6", value: "0"},
	{path: "ipv6/conf/all/accept_dad", value: "0"},
	{path: "ipv6/conf/default/accept_dad", value: "0"},
	{path: "ipv6/conf/default/accept_ra", value: "0"},
	{path: "ipv6/conf/default/router_solicitations", value: "0"},
	{path: "ipv6/conf/all/accept_redirects", value: "0"},
	{path: "ipv6/conf/default/accept_redirects", value: "0"},
	{path: "ipv6/conf/default/addr_gen_mode", value: "1"},
	// A refusal by ICMP that is held back would look like a timeout.
	{path: "ipv4/icmp_ratelimit", value: "0"},
	{path: "ipv6/icmp/ratelimit", value: "0"},
	{path: "ipv4/icmp_msgs_per_sec", value: "1000000", optional: true},
	{path: "ipv4/icmp_msgs_burst", value: "100000", optional: true},
	// Thousands of connections at once, and the same again a moment later.
	{path: "core/somaxconn", value: "65535", optional: true},
	{path: "ipv4/tcp_max_syn_backlog", value: "65535"},
	{path: "ipv4/ip_local_port_range", value: "32768 65535"},
	{path: "ipv4/tcp_tw_reuse", value: "1"},
	{path: "ipv4/tcp_fin_timeout", value: "5"},
}

var ofNode = []setting{
	{path: "ipv4/ip_forward", value: "1"},
	{path: "ipv6/conf/all/forwarding", value: "1"},
}

// ofConntrack exists once something in the namespace has asked for connection tracking. The node tracks every connection of every pod;
// two minutes of closed ones would fill the table of a small machine, whose size only the machine's own namespace can change.
var ofConntrack = []setting{
	{path: "netfilter/nf_conntrack_tcp_timeout_time_wait", value: "1", optional: true},
	{path: "netfilter/nf_conntrack_tcp_timeout_close", value: "1", optional: true},
	{path: "netfilter/nf_conntrack_tcp_timeout_last_ack", value: "2", optional: true},
	{path: "netfilter/nf_conntrack_tcp_timeout_fin_wait", value: "5", optional: true},
}

// ofApps lets unprivileged processes listen everywhere and keeps the ports that they are to listen on from being taken by connections.
func ofApps(ports []Port) []setting {
	list := []setting{{path: "ipv4/ip_unprivileged_port_start", value: "0"}}
	if len(ports) > 0 {
		numbers := make([]string, len(ports))
		for i, p := range ports {
			numbers[i] = strconv.Itoa(int(p.Number))
		}
		list = append(list, setting{path: "ipv4/ip_local_reserved_ports", value: strings.Join(numbers, ",")})
	}
	return list
}

// ofOutside lets a namespace answer for addresses that it does not have, also by a source address of such a kind.
var ofOutside = []setting{
	{path: "ipv4/conf/all/accept_local", value: "1"},
	{path: "ipv4/conf/default/accept_local", value: "1"},
	{path: "ipv4/ip_nonlocal_bind", value: "1"},
	{path: "ipv6/ip_nonlocal_bind", value: "1"},
}

func apply(log *slog.Logger, lists ...[]setting) error {
	for _, list := range lists {
		for _, s := range list {
			file := filepath.Join("/proc/sys/net", s.path)
			err := os.WriteFile(file, []byte(s.value), 0)
			switch {
			case err == nil:
			case s.optional:
				log.Debug("kernel setting left as it is", "setting", s.path, "wanted", s.value, "error", err)
			case errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(s.path, "ipv6/"):
				return fmt.Errorf("set net/%s: this kernel has IPv6 switched off, and the sandbox needs it: boot without ipv6.disable=1", s.path)
			default:
				return fmt.Errorf("set net/%s to %s: %w", s.path, s.value, err)
			}
		}
	}
	return nil
}

// manyFiles is the number of open files that the sandbox asks for; a connection is one at each end, four with a proxy.
const manyFiles = 1 << 20

// raiseFileLimit lets this process, and what it starts, open as many files as it may.
func raiseFileLimit(log *slog.Logger) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	want := unix.Rlimit{Cur: max(limit.Max, manyFiles), Max: max(limit.Max, manyFiles)}
	err := unix.Setrlimit(unix.RLIMIT_NOFILE, &want)
	if err != nil { // not root of the machine: only up to the hard limit
		want = unix.Rlimit{Cur: limit.Max, Max: limit.Max}
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &want)
	}
	if err != nil {
		return fmt.Errorf("raise the limit of open files to %d: %w", want.Cur, err)
	}
	log.Debug("open files", "limit", want.Cur)
	return nil
}
