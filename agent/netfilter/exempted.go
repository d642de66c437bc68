package netfilter

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Exempted is the user whose connections the table of the calling thread's network namespace lets pass, as [ByUser] and [ByNode] write it; nil: there
// is no table, or it exempts nobody. So the kernel remembers whom a pod's Envoy runs as, as long as there is the pod, whoever wrote it ends meanwhile.
// To change the table takes CAP_NET_ADMIN.
func Exempted() (*proxyuser.User, error) {
	conn := NewConn()
	defer conn.Close()
	var found *proxyuser.User
	err := conn.Do(func(conn *nftables.Conn) error {
		chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name == tableName && c.Name == outputChain })
		if i < 0 {
			return nil
		}
		rules, err := conn.GetRules(chains[i].Table, chains[i])
		if err != nil || len(rules) == 0 {
			return err
		}
		found, err = exempts(rules[0].Exprs)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("redirect: read whom table inet %s exempts: %w", tableName, err)
	}
	return found, nil
}

// exempts reads a rule; nil: it is no exemption of a user.
func exempts(rule []expr.Any) (*proxyuser.User, error) {
	var ids []uint32
	for _, e := range rule {
		if c, ok := e.(*expr.Cmp); ok && len(c.Data) == 4 {
			ids = append(ids, binary.NativeEndian.Uint32(c.Data))
		}
	}
	if len(ids) != 2 {
		return nil, nil
	}
	u := &proxyuser.User{UID: ids[0], GID: ids[1]}
	if same, err := sameExprs(rule, exemption(*u)); err != nil || !same {
		return nil, err
	}
	return u, nil
}
