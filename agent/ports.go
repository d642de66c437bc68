package agent

import (
	"fmt"

	"github.com/mantlet/mantlet/agent/revoke"
)

// notListening returns those of the TCP ports that no socket of the user listens on in this network namespace, for every address.
func notListening(uid uint32, ports ...uint16) ([]uint16, error) {
	listeners, err := revoke.Listeners()
	if err != nil {
		return nil, err
	}
	open := map[uint16]bool{}
	for _, l := range listeners {
		if l.UID == uid && l.Address.Addr().IsUnspecified() {
			open[l.Address.Port()] = true
		}
	}
	var closed []uint16
	for _, p := range ports {
		if !open[p] {
			closed = append(closed, p)
		}
	}
	return closed, nil
}

func portList(ports []uint16) string {
	s := fmt.Sprint(ports)
	return s[1 : len(s)-1]
}
